"""Shows which runs the colour check warns of: a sound one, and two whose pictures are drawn in a wrong way.

    python -m scripts.benchmarks.colours [--folder build/colours] [--steps 8]

Each run trains the small model that draws (tests/toy) for a few steps at a low rate, on pictures of the kind that it
was made from. The model predicts noise on the ordinary noise schedule. The second run trains and previews it with
zero_terminal_snr, and the third with v_parameterization. The script prints the drift of mean, contrast and saturation
before and after each run, and whether the run warned.
"""

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

from scripts.toy.make_model import CONFIG, write_pictures
from scripts.toy.world import scenes

TOY = Path(__file__).parents[2] / "tests" / "toy" / "toy.safetensors"
RUNS = {
    "sound": [],
    "another noise schedule": ["--zero_terminal_snr"],
    "another prediction": ["--v_parameterization"],
}
PICTURES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/colours"), help="folder to work in")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run (8)")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder / "pictures", islice(scenes(0, for_training=True), PICTURES))
    print("| run | step | mean | contrast | saturation | warned |\n|---|--:|--:|--:|--:|---|")
    for name, options in RUNS.items():
        rows, output = train(folder, name.replace(" ", "-"), [*options, "--max_train_steps", str(arguments.steps)])
        for row in rows:
            drift = [f"{row['colours'][f'drift/{figure}']:+.3f}" for figure in ("mean", "contrast", "saturation")]
            warned = f"colours after step {row['step']}: drawn pictures are" in output
            print(f"| {name} | {row['step']} | {' | '.join(drift)} | {'yes' if warned else 'no'} |", flush=True)


def train(folder: Path, name: str, options: list[str]) -> tuple[list[dict], str]:
    """Trains in a folder of its own. Returns the rows of metrics.jsonl with colours, and what the run printed."""
    command = [sys.executable, "-m", "sdxl_finetune", "--config", str(CONFIG), *options]
    data = ["--in_json", str(folder / "pictures.jsonl"), "--train_data_dir", str(folder / "pictures")]
    places = ["--output_dir", name, "--logging_dir", f"{name}/logs", "--cache_dir", "cache"]
    changes = ["--pretrained_model_name_or_path", str(TOY), "--train_batch_size", "8", "--learning_rate", "1e-6"]
    changes += [
        "--no-train_text_encoder",
        "--no-save_state",
        "--ema_half_life",
        "",
        "--colour_check_every_n_epochs",
        "1",
    ]
    run = subprocess.run(
        [*command, *data, *places, *changes],
        check=True,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log = max((folder / name / "logs").glob("*/metrics.jsonl"))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row for row in rows if "colours" in row], run.stdout


if __name__ == "__main__":
    main()
