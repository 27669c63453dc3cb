"""What both Hydra commands begin with: seeds, the run's folder, the data, the model.

Tested by tests/apps/test_cli.py: each command begins so.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from gptq_plugin.apps.data import TextData
from gptq_plugin.apps.documents import texts
from gptq_plugin.apps.language_model import LanguageModel
from gptq_plugin.apps.own_options import check_own_options


def start(cfg: DictConfig) -> Path:
    """Checks the command's own options, seeds everything and returns the folder Hydra gave this run."""
    check_own_options(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    _once_and_without_advertisements()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    return Path(HydraConfig.get().runtime.output_dir)


def _once_and_without_advertisements() -> None:
    """Leaves the messages of libraries to Hydra's handlers alone, which print what reaches the root logger."""
    if logging.getLogger().hasHandlers():
        for library in ("lightning", "huggingface_hub", "datasets"):  # these have handlers too, and propagate
            logging.getLogger(library).handlers.clear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # in Lightning


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in str(record.msg)


def instantiate_plain(node: Any, *args: Any, **kwargs: Any) -> Any:
    # _convert_="all": plain dicts and lists, since libraries do not take OmegaConf's.
    return instantiate(node, *args, _convert_="all", **kwargs)


def plain(node: Any) -> Any:
    return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node


def data_and_model(cfg: DictConfig) -> tuple[TextData, LanguageModel]:
    """Makes the data and the model. The tokenizer comes first, and may have to be trained on the text."""
    data: TextData = instantiate_plain(cfg.data)
    model: LanguageModel = instantiate_plain(cfg.model, texts(data.documents))
    return data.encode(model.tokenizer), model
