"""Models: what they are, their decoder, how they are loaded, and their tokenizers."""

from paged_flash.models.config import ModelConfig, RopeScaling
from paged_flash.models.load import KNOWN, find, load
from paged_flash.models.tokenizer import TextStream, Tokenizer
from paged_flash.models.transformer import Attend, Model, Transformer, first_layers

__all__ = [
  "KNOWN",
  "Attend",
  "Model",
  "ModelConfig",
  "RopeScaling",
  "TextStream",
  "Tokenizer",
  "Transformer",
  "find",
  "first_layers",
  "load",
]
