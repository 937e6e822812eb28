"""The code of autoload: registers SpikeLoRA once some module has imported `peft`.

The text of this file goes into a .pth file, and may stay in an environment after this package is removed. It is
compiled when one of three packages is first imported. A finder of a few lines in the .pth file waits for that
(`autoload.py`).
"""

import sys
from _thread import get_ident

# They import each other, and `spikelora` needs all three fully imported.
PACKAGES = ("accelerate", "peft", "transformers")


class SpikeLoraAutoload:
    """A finder of modules that lets the later finders find, and acts once the module that they found has run."""

    def __init__(self):
        self.running = []  # the thread of each module of the three packages that is being imported
        self.is_done = False

    def find_spec(self, name, path=None, target=None):
        if self.is_done or name.partition(".")[0] not in PACKAGES or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                # Modules in a zip file share a loader, and other loaders may not take an attribute: they are left
                # alone.
                if getattr(spec.loader, "name", None) == name and hasattr(spec.loader, "__dict__"):
                    self.follow(spec.loader)
                return spec
        return None

    def follow(self, loader):
        """Act after this one run of a loader, and then leave the loader as it was."""
        run = loader.exec_module

        def exec_module(module):
            thread = get_ident()
            self.running.append(thread)
            try:
                run(module)
            finally:
                self.running.remove(thread)
                vars(loader).pop("exec_module", None)
            if module.__name__ == "transformers.integrations.peft" and hasattr(module, "PeftAdapterMixin"):
                import_peft_before_loading(module.PeftAdapterMixin)
            # A module of the user's own may be called peft as well.
            if thread not in self.running and hasattr(sys.modules.get("peft"), "PeftType"):
                self.register()

        loader.exec_module = exec_module

    def register(self):
        self.is_done = True  # it is not removed, because another thread may be going through the finders
        if "spikelora" in sys.modules:  # it has imported PEFT itself
            return
        try:
            import spikelora  # noqa: F401
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "spikelora":
                return  # uninstalled, and the file has stayed
            import warnings

            warnings.warn(
                f"SpikeLoRA is not registered with PEFT: {error!r}. `spikelora autoload off` ends the attempts.",
                RuntimeWarning,
                stacklevel=2,
            )


def import_peft_before_loading(mixin):
    """Make transformers' `load_adapter` import PEFT first, because the registration replaces that very method."""
    from contextlib import suppress
    from functools import wraps

    load_adapter = mixin.load_adapter

    @wraps(load_adapter)
    def with_peft(self, *args, **kwargs):
        before = mixin.load_adapter
        with suppress(ImportError):  # transformers says what is missing
            import peft  # noqa: F401
        after = mixin.load_adapter
        return (load_adapter if after is before else after)(self, *args, **kwargs)

    mixin.load_adapter = with_peft


def take_over(waiting, name, path, target):
    """Replace the waiting finder by this one, and find the first module with it."""
    if waiting in sys.meta_path:  # else another thread was quicker
        sys.meta_path[sys.meta_path.index(waiting)] = SpikeLoraAutoload()
    for finder in sys.meta_path:
        if type(finder).__name__ == SpikeLoraAutoload.__name__:
            return finder.find_spec(name, path, target)
    return None
