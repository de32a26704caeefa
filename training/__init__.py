"""From recorded answers to a proven adapter: one file per stage, each runnable by itself, in order under `dvc repro`."""
