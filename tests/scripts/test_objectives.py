"""Conversions between objectives: arms differ in their objective only, and a slice of each recipe runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from scripts.benchmarks import proof, proof_flows
from scripts.benchmarks.conversions import ARMS, Drawn, Plan, Result, measure_all, options_of
from scripts.benchmarks.objectives import contact_sheet, steps_needed, tables, with_parts
from scripts.benchmarks.proof_runs import TOY, Row
from scripts.toy.judge import Score
from scripts.toy.style import write_pictures
from sdxl_finetune.config import load_config
from sdxl_finetune.output.colours import NAMES

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
SLICE = Plan(pictures=40, steps=2, judged=(1, 2), captions=2, shown=2)
DIFFERENCES = {
    "noise": set(),
    "velocity": {"v_parameterization", "zero_terminal_snr"},
    "flow": {"flow_model", "flow_timestep_distribution"},
    "flow-uniform": {"flow_model", "flow_timestep_distribution"},
    "flow-paired": {"flow_model", "flow_timestep_distribution", "flow_use_ot"},
    "flow-weighted": {"flow_model", "flow_timestep_distribution", "edm2_loss_weighting"},
}
"""Options in which each arm differs from the control."""


def test_arms_differ_from_the_control_in_their_objective_only(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 2)
    places = ["--train_data_dir", str(tmp_path / "pictures"), "--output_dir", str(tmp_path)]
    places += ["--pretrained_model_name_or_path", str(TOY), "--logging_dir", str(tmp_path), "--output_name", "model"]
    places += ["--save_every_n_epochs", "", "--sample_every_n_epochs", "", "--no-sample_at_first"]
    values = {}
    for name, arm in ARMS.items():
        options = ["--config", str(arm.config), *places, *options_of(arm, 0, SLICE, tmp_path / "cache")]
        config = load_config(options, program="sdxl-train")
        assert config is not None and config.objective == arm.kind
        values[name] = config.model_dump()
    without_effect = {"sample_sampler", "save_model_as"}
    for name, own in values.items():
        differences = {option for option, value in own.items() if value != values["noise"][option]}
        assert differences - without_effect == DIFFERENCES[name], name


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], Result]]:
    """Two steps of both recipes on the small model, with real trainings and real pictures."""
    folder = tmp_path_factory.mktemp("proof") / "objectives"
    return folder, measure_all(folder, [("velocity", 0), ("flow", 0)], SLICE)


def test_a_slice_of_the_recipes_runs(slices: tuple[Path, dict[tuple[str, int], Result]]) -> None:
    folder, results = slices
    for (name, seed), result in results.items():
        run = folder / f"{name}-{seed}"
        assert list(result.drawn) == [1, 2] and list(result.losses) == [0, 2]
        assert len(result.losses[0]) == 11
        assert result.losses[2]["loss"] < result.losses[0]["loss"], "a wrong objective is learned from the first step"
        for drawn in result.drawn.values():
            with Image.open(drawn.row) as row:
                assert set(drawn.colours) == set(NAMES) and row.size == (128, 64)
        assert [path.name for path in run.glob("*.safetensors")] == ["model.safetensors"], "others are removed"
        with safe_open(run / "model.safetensors", "pt") as file:
            assert ("v_pred" in set(file.keys())) == (name == "velocity")
    assert measure_all(folder, list(results), SLICE) == results, "finished parts are kept"
    with pytest.raises(SystemExit, match="measurements of other sizes"):
        measure_all(folder, list(results), Plan())


def test_a_contrast_compares_runs_of_the_same_folder(
    slices: tuple[Path, dict[tuple[str, int], Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are those of the slice, once as the option and once as the base, so that nothing differs."""
    folder, results = slices
    asked = []

    def measured_slice(place: Path, jobs: Sequence[tuple[str, int]], plan: Plan) -> dict[tuple[str, int], Result]:
        asked.extend(jobs)
        assert place == folder and plan is SLICE
        return dict.fromkeys(jobs, results["flow", 0])

    monkeypatch.setattr(proof_flows, "measure_all", measured_slice)
    row = proof_flows.flow_times(folder.with_name("proof"), SLICE)
    assert set(asked) == {(name, seed) for name in ("flow", "flow-uniform") for seed in (0, 1, 2)}
    assert not row.holds and "a difference of 0.0% ± 0.0" in row.measured
    row = proof_flows.flow_weights(folder.with_name("proof"), SLICE)
    assert not row.holds and "after 2 steps" in row.measured


def test_lines_of_other_contrasts_stay_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "proof.md"
    page.write_text(f"Text.\n\n{proof.TABLE}| `twins` | a | b | c | yes |\n| `full_bf16` | d | e | f | yes |\n")
    monkeypatch.setattr(proof, "PAGE", page)
    proof.write({"guidance": Row("g", "h", "i", False), "twins": Row("j", "k", "l", True)})
    assert page.read_text() == (
        f"Text.\n\n{proof.TABLE}| `twins` | j | k | l | yes |\n| `guidance` | g | h | i | **no** |\n"
        "| `full_bf16` | d | e | f | yes |\n"
    )


def result_of(pairs: Sequence[float], row: Path) -> Result:
    """A result with these shares of right objects at the steps of the default plan."""
    drawn = {
        step: Drawn(
            right=Score(share, share, share, share, 1.0, 1.0, 0.0), colours=dict.fromkeys(NAMES, 0.01), row=str(row)
        )
        for step, share in zip(Plan().judged, pairs, strict=True)
    }
    return Result(drawn=drawn, losses={0: {"loss": 1.0, "loss/t050": 1.5}, 300: {"loss": 0.2, "loss/t050": 0.5}})


def test_steps_are_counted_until_captions_stay_followed(tmp_path: Path) -> None:
    late = result_of((0.1, 0.8, 0.5, 0.78, 0.8, 0.9), tmp_path)
    early = result_of((0.1, 0.8, 0.8, 0.78, 0.8, 0.9), tmp_path)
    never = result_of((0.9, 0.8, 0.8, 0.78, 0.8, 0.5), tmp_path)
    assert steps_needed([late], 0.8, Plan()) == "150"
    assert steps_needed([late, early], 0.8, Plan()) == "150, 50: 100 ± 50"
    assert steps_needed([late, never], 0.8, Plan()) == "not within 300"


def test_the_page_has_a_place_for_each_table(tmp_path: Path) -> None:
    row = tmp_path / "row.png"
    Image.new("RGB", (128, 64), "red").save(row)
    runs = [result_of((0.1, 0.8, 0.8, 0.78, 0.8, share), row) for share in (0.6, 0.8)]
    control = [result_of((0.5,) * 6, row)] * 2
    names = [f"before as {kind}" for kind in ("noise", "velocity", "flow")]
    names += ["velocity drawn as a model of noise", "velocity drawn without zero terminal SNR"]
    names += ["flow drawn as a model of noise", "flow drawn as a model of velocity"]
    others = dict.fromkeys(names, control[0].drawn[300])
    parts = tables({"noise": control, "velocity": runs, "flow": runs}, others, Plan())
    assert "| flow less noise | 20 % ± 10 | 20 % ± 10 | 20 % ± 10 | 0 % ± 0 |" in parts["equal steps"]
    page = with_parts(PAGE.read_text(encoding="utf-8"), parts)
    assert all(part in page for part in parts.values())
    assert with_parts(page, parts) == page
    sheet = contact_sheet("flow", runs[0], others, Plan())
    assert sheet.width >= 256 and sheet.height > 8 * 128
