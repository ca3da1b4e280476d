"""Checkpoints that people already have: those of transformers' Trainer, of Lightning, and of PEFT's adapters."""

from source_proj.integrations.callback import RecorderCallback
from source_proj.integrations.hf_trainer import hf_trainer_stage
from source_proj.integrations.lightning import lightning_stage

__all__ = ["RecorderCallback", "hf_trainer_stage", "lightning_stage"]
