"""Other libraries: runs of transformers' Trainer, of Lightning and of PEFT; the conventions of captum and quanda."""

from source_proj.integrations.callback import RecorderCallback
from source_proj.integrations.captum import CaptumInfluence
from source_proj.integrations.hf_trainer import hf_trainer_stage
from source_proj.integrations.lightning import lightning_stage
from source_proj.integrations.model_task import task_for
from source_proj.integrations.peft import trainable_parameters
from source_proj.integrations.pretrained import load_pretrained
from source_proj.integrations.quanda import QuandaExplainer
from source_proj.integrations.text import TextData, TextRows, TextsChangedError, own_rows, require_own_texts
from source_proj.integrations.text_bank import TextBank
from source_proj.integrations.text_settings import TextSettings

__all__ = [
    "CaptumInfluence",
    "QuandaExplainer",
    "RecorderCallback",
    "TextBank",
    "TextData",
    "TextRows",
    "TextSettings",
    "TextsChangedError",
    "hf_trainer_stage",
    "lightning_stage",
    "load_pretrained",
    "own_rows",
    "require_own_texts",
    "task_for",
    "trainable_parameters",
]
