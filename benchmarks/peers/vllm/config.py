"""The config of a model shape, and typical plans for it, for another environment. Run with MoA installed:

python config.py llama-7b FOLDER --density 0.5
(run.py in vLLM's own environment: see requirements.txt)
"""

import argparse
from pathlib import Path

from moa.benchmark.shapes import SHAPES
from moa.benchmark.throughput import typical_plan
from moa.plan import ModelIdentity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--density", type=float, nargs="*", default=[], help="of plans, written beside the config")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]]
    config.save_pretrained(arguments.folder)
    for density in arguments.density:
        plan = typical_plan(ModelIdentity.of(config), density)
        plan.save(Path(arguments.folder) / f"plan-{100 * density:g}.json")


if __name__ == "__main__":
    main()
