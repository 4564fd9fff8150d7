"""Conversion of checkpoints of the original DiT, DTR and ANT code to this package's models, and back."""

from .checkpoint_file import load_original_checkpoint
from .state_dict import convert_original_dit, original_dit_state_dict


__all__ = ["convert_original_dit", "load_original_checkpoint", "original_dit_state_dict"]
