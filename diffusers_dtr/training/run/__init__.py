"""A run around its training loop: its folder, checkpoints, record, log and what it pushes."""
