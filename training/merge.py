"""Merge: an adapter folded into its base, examined as the very weights that would be served before anybody gets them.

Folding rounds, so what was measured of the adapter says nothing of the merged weights: they answer the same held-out items, and are kept
only if they lose no more than they may. They are served as they are, at full width: rounded to 4 bits again, one adapter's 461 of 500 right
answers became 3. This stage promotes nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from inference import adapters, base
from training import settings
from training.evaluate import EvaluateSettings, evaluate
from training.finetune import MANIFEST
from tutelage.errors import AdapterRejected
from tutelage.settings import Home

MOST_LOST = 0.01  # of accuracy on the held-out items
GATE = "gate.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.merge", description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder that training.finetune wrote")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of held-out items that judge both")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged base")
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--most-lost", type=float, default=MOST_LOST, help=f"accuracy that merging may cost (default: {MOST_LOST})")
    arguments = parser.parse_args()
    settings.without_bars()
    base_dir = arguments.base or base.materialise(Home.from_environment().models)
    report = merge(arguments.adapter, arguments.out, data=arguments.data, base_dir=base_dir, most_lost=arguments.most_lost)
    print(f"merge: {report['merged']['correct']} of {report['merged']['n']} right, {report['adapter']['correct']} unmerged")


def merge(adapter: Path, out: Path, *, data: Path, base_dir: Path, most_lost: float = MOST_LOST) -> dict[str, Any]:
    """Write the merged base with its `gate.json` to `out` and return that report; nothing is left there when it fails.

    Raises AdapterRejected when the adapter is another base's, or the merged weights answer worse by more than `most_lost`.
    """
    import torch
    from peft import PeftModel

    manifest = json.loads((adapter / MANIFEST).read_text())
    adapters.verify(adapter, digest=manifest["adapter_digest"], base_fingerprint=base.fingerprint(base_dir))
    # onto the rounded weights it was trained on, kept at full width: never onto 4-bit ones
    model, tokenizer = base.load(base_dir, quantization=base.SERVING, precision=base.Precision("float32", "merged"))
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    merged.to(torch.bfloat16).save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    del model, merged
    made = {"base": base_dir.name, "adapter_digest": manifest["adapter_digest"], "student_fingerprint": base.fingerprint(out)}
    (out / MANIFEST).write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
    # through the engine that would serve it: this is what clients would get
    config = EvaluateSettings(untrained_items=0)
    report = {
        "adapter_digest": made["adapter_digest"],
        "merged_fingerprint": made["student_fingerprint"],
        "adapter": evaluate(adapter, data, base_dir=base_dir, config=config),
        "merged": evaluate(None, data, base_dir=out, config=config),
    }
    lost = report["adapter"]["accuracy"] - report["merged"]["accuracy"]
    if lost > most_lost:
        shutil.rmtree(out)
        raise AdapterRejected(
            f"merged, the adapter answers {lost:.1%} fewer of {report['merged']['n']} items right; allowed is {most_lost:.1%}. "
            "Serve it unmerged"
        )
    (out / GATE).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    return report


if __name__ == "__main__":
    main()
