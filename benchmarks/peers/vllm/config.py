"""The config of a model shape, for another environment. Run with MoA installed:

python config.py llama-7b FOLDER
(run.py in vLLM's own environment: see requirements.txt)
"""

import argparse

from moa.benchmark.shapes import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    config.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]]
    config.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
