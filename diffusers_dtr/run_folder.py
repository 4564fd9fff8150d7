"""How things are called that lie in a run's folder: training writes them, model cards tell of them, pushes share them.

Names of files that others have come to look for. They stay.
"""

# Of a pipeline and of adapters, as diffusers calls them.
PIPELINE_INDEX = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"

RECORD_FILE = "training_config.json"
HISTORY_FILE = "loss_history.jsonl"
LOSSES_PICTURE = "loss_per_cluster.png"
# What evaluations write, with `save_metrics`.
METRICS_FILE = "metrics.json"

CHECKPOINT_PREFIX = "checkpoint-"
# Held by the process that trains, which it names in a file beside it
RUN_LOCK = ".run.lock"

# Folders of what is computed once, and of what is not complete or not yet pushed.
LATENTS = "latents"
TEXT_EMBEDDINGS = "text_embeddings"
PARTIAL_PIPELINE = ".pipeline.partial"
PREVIOUS_PIPELINE = ".pipeline.previous"
PUSH_SNAPSHOTS = ".push"
