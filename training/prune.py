"""Prune: a shallower copy of a base, of its layers only every n-th or so, to be distilled from the base it was cut from.

The copy is a base of its own: another fingerprint, the same tokenizer, so its parent's probabilities fit it token by token. Cutting
layers costs accuracy until it is trained; this stage trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from inference import base
from training import settings
from training.recipe import TrainingFailed
from tutelage.settings import Home


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shallower base")
    parser.add_argument("--keep", type=int, required=True, help="how many layers stay, spread evenly, the first and the last among them")
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--adapter", type=Path, help="merge this adapter into the base before cutting: the child of a finetuned parent")
    arguments = parser.parse_args()
    settings.without_bars()
    kept = prune(
        arguments.base or base.materialise(Home.from_environment().models), arguments.out, keep=arguments.keep, adapter=arguments.adapter
    )
    print(f"prune: {len(kept)} layers kept; base in {arguments.out}")


def kept_layers(layers: int, keep: int) -> list[int]:
    """Which `keep` of the layers stay: evenly spread, the first and the last, which touch words, always.

    Raises TrainingFailed unless two or more stay and at least one goes.
    """
    if not 2 <= keep < layers:
        raise TrainingFailed(f"keep={keep} of {layers} layers leaves nothing to cut or to keep; take from 2 to {layers - 1}")
    return [round(place * (layers - 1) / (keep - 1)) for place in range(keep)]


def prune(base_dir: Path, out: Path, *, keep: int, adapter: Path | None = None) -> Sequence[int]:
    """Write the shallower copy of a base, or of a base with an adapter merged into it, to `out`; returns the layers kept.

    Raises TrainingFailed when nothing can be cut, BaseUnavailable when the base is incomplete.
    """
    import torch
    from peft import PeftModel

    model, tokenizer = base.load(base_dir, quantization=base.SERVING if adapter else "none", precision=base.Precision("float32", "saved"))
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    kept = kept_layers(model.config.num_hidden_layers, keep)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place  # the cache is indexed by it
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return kept


if __name__ == "__main__":
    main()
