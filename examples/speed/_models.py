"""The models whose passes are timed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Decoder",
    "Encoder",
    "Recurrent",
    "ResNet9",
    "Stack",
    "gpt2",
    "gpt2_of_transformers",
    "minilm",
    "mixture",
    "mlp",
    "vit",
]


def mlp() -> nn.Module:
    """784-256-128-10."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


class ResNet9(nn.Module):
    """The usual one for 32×32 images: 64-128-256-512 channels, two residual blocks, 6.6 million parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()

        def block(inner: int, outer: int, pool: bool = False) -> nn.Sequential:
            layers = [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))

        self.first = nn.Sequential(block(3, 64), block(64, 128, pool=True))
        self.residual_1 = nn.Sequential(block(128, 128), block(128, 128))
        self.second = nn.Sequential(block(128, 256, pool=True), block(256, 512, pool=True))
        self.residual_2 = nn.Sequential(block(512, 512), block(512, 512))
        self.head = nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(self.residual_1(x) + x)
        logits: Tensor = self.head(self.residual_2(x) + x)
        return logits


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return y


class Decoder(nn.Module):
    """GPT-shaped, embedding and head tied; by default 4 layers of width 256, 4,096 tokens, 4.2 million parameters."""

    def __init__(self, vocab: int = 4096, width: int = 256, layers: int = 4, heads: int = 8, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def minilm() -> nn.Module:
    """MiniLM's shape, a BERT of 6 layers of width 384 with a classifier, from transformers (the extra hf)."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig.from_dict({**shape, "num_labels": 2}))


def gpt2_of_transformers() -> nn.Module:
    """The decoder above as transformers has it, its layers `Conv1D`: 4 of width 256, 4,096 tokens (the extra hf)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 4096, "n_positions": 128, "n_embd": 256, "n_layer": 4, "n_head": 8}
    return GPT2LMHeadModel(GPT2Config.from_dict({**shape, "bos_token_id": 0, "eos_token_id": 0}))


def mixture() -> nn.Module:
    """The same with 8 experts a layer, 2 of them for each token, as Qwen 3 has them (the extra hf): 12 million."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32}
    routed = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "num_key_value_heads": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict({**shape, **routed}))


def gpt2() -> nn.Module:
    """Of the shape of the smallest GPT-2, over 512 tokens: 12 layers of width 768, 50,257 tokens, 124 million."""
    return Decoder(50257, 768, 12, 12, 512)


class Stack(nn.Module):
    """Four layers of width 4,096 over positions, and a small head over their mean; 67 million parameters."""

    def __init__(self, width: int = 4096, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Encoder(nn.Module):
    """torch's own encoder: 4 layers of width 256 with `MultiheadAttention`, and positions that are a parameter."""

    def __init__(self, vocab: int = 4096, width: int = 256, layers: int = 4, heads: int = 8, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.randn(1, length, width) / width**0.5)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.tokens(x) + self.positions).mean(1))
        return logits


class Recurrent(nn.Module):
    """A language model of two recurrent layers of width 256, over 256 characters, about a million parameters."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], vocab: int = 256, width: int = 256) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.layers = kind(width, width, num_layers=2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.tokens(input_ids))[0])
        return logits


def vit() -> nn.Module:
    """A vision transformer of transformers (the extra hf): 6 layers of width 384, 4×4 patches, 10.7 million."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(
        ViTConfig.from_dict({**shape, "image_size": 32, "patch_size": 4, "num_labels": 10})
    )
