"""What training scripts share: data, arguments, checkpoints, validation."""
