"""How rows are stored in few bytes: one codec a file, each under the name that ``storage=`` takes."""

from source_proj.bank.codecs.base import Codec, EncodedRows, codec_names, find_codec
from source_proj.bank.codecs.float16 import Float16
from source_proj.bank.codecs.float32 import Float32
from source_proj.bank.codecs.int1 import Int1
from source_proj.bank.codecs.int2 import Int2
from source_proj.bank.codecs.int4 import Int4
from source_proj.bank.codecs.int8 import Int8

__all__ = ["Codec", "EncodedRows", "Float16", "Float32", "Int1", "Int2", "Int4", "Int8", "codec_names", "find_codec"]
