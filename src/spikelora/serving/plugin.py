"""The entry point in `vllm.general_plugins`, which vLLM calls in each of its processes."""

import functools
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

_log = logging.getLogger("vllm.spikelora")  # below vLLM's own logger, so that its lines are shown like vLLM's


def register() -> None:
    """Arrange that the gate is put into vLLM's LoRA when a process sets LoRA up; it may be called again.

    With an untested version of vLLM it only warns: vLLM then refuses the tensors of a gate.
    """
    import vllm
    from vllm.platforms import current_platform

    tested = _tested_versions()
    if not tested.specifier.contains(vllm.__version__, prereleases=True):
        _log.warning(
            "spikelora serves spiking adapters with %s and leaves vLLM %s as it is, which refuses them: "
            "install one of those versions, or upgrade spikelora.",
            tested,
            vllm.__version__,
        )
        return
    platform = type(current_platform)
    function = platform.get_punica_wrapper.__func__
    if function.__globals__["__name__"] != __name__:
        platform.get_punica_wrapper = classmethod(_changing_first(function))


def _changing_first(get_punica_wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's own, which is called when a worker makes its LoRA layers.

    vLLM's layers are not imported before that: its other processes do not need them, and should not touch a GPU.
    """

    @functools.wraps(get_punica_wrapper)
    def changing_first(cls: Any) -> str:
        from spikelora.serving.changes import change_vllm

        change_vllm()
        return get_punica_wrapper(cls)

    return changing_first


def _tested_versions() -> Requirement:
    try:
        found = [Requirement(line) for line in requires("spikelora") or []]
    except PackageNotFoundError:  # vLLM found the entry point, so this is a half-removed installation
        found = []
    return next((requirement for requirement in found if requirement.name == "vllm"), Requirement("vllm<0"))
