"""The adapters of one loaded model: attached and detached while it serves, chosen per row of a batch.

Knows PEFT's layers, names and who still uses what. It refuses to know prompts, tokens and how adapters were trained.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.adapters import FUNCTION_FIELDS, AdapterInfo, VerifiedAdapter, open_verified
from tutelage.errors import AdapterRejected, ModelNotFound

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BASE = "__base__"  # PEFT's name for "no adapter" in a row
PREFIX = "lora_"


@dataclass
class Attached:
    """An adapter inside the model; it leaves once it is retired and no request uses it."""

    key: str
    digest: str
    users: int = 0
    retired: bool = False


class AdapterRack:
    """Adapters by the name they are served under. Safe to call from any thread.

    Changes wait for a running forward pass and take effect before the next one.
    """

    def __init__(self, model: PreTrainedModel, *, base_fingerprint: str) -> None:
        self._layers = LoraLayers(model)
        self._fingerprint = base_fingerprint
        self._named: dict[str, Attached] = {}
        self._by_key: dict[str, Attached] = {}
        self._numbers = itertools.count(1)
        self._book = threading.Lock()  # guards names, keys and use counts; held for moments only
        self._model = threading.Lock()  # held for a forward pass, or while layers change

    def load(self, name: str, adapter_dir: Path, *, digest: str) -> AdapterInfo:
        """Serve the adapter as `name` from the next request on. Raises AdapterRejected: then nothing has changed."""
        verified = open_verified(adapter_dir, digest=digest, base_fingerprint=self._fingerprint)
        if self.digests().get(name) == digest:
            return verified.info
        attached = Attached(f"@{next(self._numbers)}", digest)
        with self._model:
            self._layers.attach(attached.key, verified)
        with self._book:
            self._retire(name)
            self._named[name] = self._by_key[attached.key] = attached
        self._sweep()
        return verified.info

    def unload(self, name: str) -> None:
        """Stop serving `name`; requests that already hold it finish. Raises ModelNotFound."""
        with self._book:
            self._find(name)
            self._retire(name)
        self._sweep()

    def digests(self) -> dict[str, str]:
        """Return the digest of every adapter by the name it is served under."""
        with self._book:
            return {name: attached.digest for name, attached in self._named.items()}

    def digest(self, name: str) -> str:
        """Return the digest behind a name or key. Raises ModelNotFound."""
        with self._book:
            return self._find(name).digest

    def hold(self, names: Sequence[str | None]) -> list[Attached | None]:
        """Keep the adapters behind names or keys from leaving until `release`; None stays None. Raises ModelNotFound."""
        with self._book:
            found = [None if name is None else self._find(name) for name in names]
            for attached in filter(None, found):
                attached.users += 1
        return found

    def release(self, held: Sequence[Attached | None], *, sweep: bool = True) -> None:
        """Give back what `hold` returned. `sweep=False` never blocks and leaves the removal to the next call that may."""
        with self._book:
            for attached in filter(None, held):
                attached.users -= 1
        if sweep:
            self._sweep()

    @contextmanager
    def forward(self, rows: Sequence[Attached | None]) -> Iterator[None]:
        """Within this context row i of a forward pass uses adapter `rows[i]`, or the bare base for None."""
        with self._model, self._layers.rows([row.key if row else BASE for row in rows]):
            yield

    def _find(self, name: str) -> Attached:
        found = self._by_key.get(name) or self._named.get(name)
        if found is None:
            raise ModelNotFound(f"no model or adapter named {name!r} is here; loaded adapters: {sorted(self._named)}", param="model")
        return found

    def _retire(self, name: str) -> None:
        attached = self._named.pop(name, None)
        if attached:
            attached.retired = True

    def _sweep(self) -> None:
        """Take retired adapters that nobody uses out of the model."""
        with self._book:
            idle = [attached.key for attached in self._by_key.values() if attached.retired and attached.users == 0]
            for key in idle:
                del self._by_key[key]
        if idle:
            with self._model:
                for key in idle:
                    self._layers.detach(key)


class LoraLayers:
    """PEFT's layers inside one model. Not safe to use from two threads at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._rows: list[str] = []
        self._hooked: set[torch.nn.Module] = set()

    def attach(self, key: str, adapter: VerifiedAdapter) -> None:
        """Add the adapter's weights under `key`. Raises AdapterRejected and leaves the model as it was."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns about a second adapter; many are the purpose here
                self._inject(key, adapter)
        except AdapterRejected:
            self.detach(key)
            raise
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            self.detach(key)
            reason = " ".join(str(error).split())[:300]
            raise AdapterRejected(
                f"the adapter in {adapter.info.path} does not fit this base ({reason}); train it on this base with training.finetune"
            ) from error

    def detach(self, key: str) -> None:
        """Remove the adapter under `key`, if it is there."""
        from peft.functional import delete_adapter

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            delete_adapter(self._model, key, prefix=PREFIX)
        getattr(self._model, "peft_config", {}).pop(key, None)

    @contextmanager
    def rows(self, keys: list[str]) -> Iterator[None]:
        """Within this context row i of a forward pass uses the adapter under `keys[i]`."""
        self._rows = keys
        try:
            yield
        finally:
            self._rows = []

    def _inject(self, key: str, adapter: VerifiedAdapter) -> None:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
        from safetensors.torch import load

        # Only the digested fields reach PEFT: nothing else in the file can change what is loaded.
        named = {"peft_type", "task_type"}
        fields = {f: adapter.config[f] for f in FUNCTION_FIELDS if f in adapter.config and f not in named}
        config = LoraConfig(**fields, task_type="CAUSAL_LM", inference_mode=True)
        inject_adapter_in_model(config, self._model, key, low_cpu_mem_usage=True)
        result = set_peft_model_state_dict(self._model, load(adapter.weights), key, low_cpu_mem_usage=True)
        missing = [name for name in result.missing_keys if f".{key}." in name]
        if missing or result.unexpected_keys:
            odd = (missing + list(result.unexpected_keys))[0]
            kind = "lacks" if missing else "has unknown"
            raise AdapterRejected(f"the adapter in {adapter.info.path} {kind} tensor {odd!r}; train it on this base")
        self._hook_new_layers()

    def _hook_new_layers(self) -> None:
        """Pass the row choice to every LoRA layer.

        The same argument that PEFT's own `adapter_names=` sends, through hooks that stay: PEFT adds and removes a hook per
        layer on every forward, and leaves them behind when a forward fails.
        """
        from peft.tuners.lora import LoraLayer

        for module in self._model.modules():
            if isinstance(module, LoraLayer) and module not in self._hooked:
                module.register_forward_pre_hook(self._choose_rows, with_kwargs=True)
                self._hooked.add(module)

    def _choose_rows(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self._rows}
