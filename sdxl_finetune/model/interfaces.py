"""The rules by which each user interface recognises the objective, and takes a checkpoint for what it is.

No interface reads metadata, and none has a marker for a flow of SDXL: users set it by hand. The rules were read in the
sources of the interfaces, at these places:

- ComfyUI: `SDXL.model_type` in comfy/supported_models.py
- AUTOMATIC1111: modules/sd_models_config.py, pull requests 16567 and 16569 (October 2024, after release 1.10)
- Forge: `SDXL.model_type` of huggingface_guess, and `split_state_dict` and `forge_loader` in backend/loader.py
- reForge: ldm_patched/modules/supported_models.py and modules_forge/forge_loader.py
- diffusers: `scheduler_config.json`; `from_single_file` does not look at the tensors

Flows are set with ComfyUI's node ModelSamplingSD3 (comfy_extras/nodes_model_advanced.py) and in reForge with its
extension reForge-advanced_model_sampling. AUTOMATIC1111 and Forge sample SDXL only from noise and velocity
(`k_prediction_from_diffusers_scheduler` in Forge's backend/modules/k_prediction.py).
"""

from collections.abc import Iterator
from pathlib import Path

from sdxl_finetune.config.flow_options import FlowOptions, fixed_shift
from sdxl_finetune.model.declared import EDM, V_PRED, ZTSNR, read_declared
from sdxl_finetune.model.tensorfile import TensorFile

_NEEDS_V_PRED = ("ComfyUI",)
"""Interfaces that look for `ztsnr` only in models with `v_pred`."""
_READ_YAML = ("AUTOMATIC1111", "Forge")
"""Interfaces for which a .yaml file of the same name beside the checkpoint wins over the tensors."""
_INTERFACES = ("ComfyUI", "AUTOMATIC1111", "Forge", "reForge")


def describe_interfaces(path: Path, file: TensorFile) -> Iterator[str]:
    """Yields a line for each interface with what it takes the SDXL model at `path` for, and why.

    A last line says what to do if the checkpoint itself says something else.
    """
    if path.is_dir():
        yield f"diffusers takes it for {_folder_kind(file)}"
        yield "ComfyUI, AUTOMATIC1111, Forge and reForge open single files: convert it to .safetensors for them"
        return
    for name in _INTERFACES:
        yield f"{name} takes it for {_kind(name, path, file)}"
    yield "diffusers takes it for what the pipeline's scheduler is set to, because from_single_file reads no marker"
    declared = read_declared(file)
    if declared.objective == "flow":
        yield from _flow_settings(declared.flow)
    missing = [
        key
        for key, said in ((V_PRED, declared.objective == "velocity"), (ZTSNR, declared.zero_terminal_snr))
        if said and declared.objective != "flow" and key not in file.tensors
    ]
    if missing:
        yield f"its metadata says more, which no interface reads: sdxl-model convert adds {' and '.join(missing)}"


def _kind(name: str, path: Path, file: TensorFile) -> str:
    if name in _READ_YAML and path.with_suffix(".yaml").is_file():
        return f"what {path.with_suffix('.yaml').name} beside it says"
    found = [key for key in EDM if key in file.tensors]
    if found and name != "AUTOMATIC1111":
        return f"an EDM model ({_tensors(found)})"
    v_pred, ztsnr = V_PRED in file.tensors, ZTSNR in file.tensors
    kind = f"v-prediction ({_tensors([V_PRED])}" if v_pred else f"noise prediction (no tensor {V_PRED}"
    if ztsnr and (v_pred or name not in _NEEDS_V_PRED):
        kind += f"), zero terminal SNR ({_tensors([ZTSNR])}"
    elif ztsnr:
        kind += f", without which {ZTSNR} counts for nothing"
    if name == "AUTOMATIC1111" and (v_pred or ztsnr):
        kind += "; releases up to 1.10 need a .yaml file beside it"
    return kind + ")"


def _flow_settings(flow: FlowOptions) -> Iterator[str]:
    """Yields a line for each interface with what the user sets there for a flow."""
    fixed = fixed_shift(flow)
    shift = f"the root of width x height / {flow.flow_uniform_base_pixels:.7g}" if fixed is None else f"{fixed:g}"
    yield "but it is a flow, for which interfaces have no marker. Set it by hand:"
    yield f"  ComfyUI: node ModelSamplingSD3 with shift {shift}, sampler euler or heun, scheduler simple"
    yield f"  reForge: Advanced Model Sampling, mode SD3, with shift {shift}, sampler Euler or Heun, schedule Simple"
    settings = f"prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift={shift}"
    yield f"  diffusers: DPMSolverMultistepScheduler({settings})"
    yield "  AUTOMATIC1111 and Forge cannot draw flows of SDXL"


def _tensors(keys: list[str]) -> str:
    return f"{'tensor' if len(keys) == 1 else 'tensors'} {', '.join(keys)}"


def _folder_kind(file: TensorFile) -> str:
    declared = read_declared(file)
    if declared.objective == "flow":
        said = file.scheduler.get("flow_shift", file.scheduler.get("shift", 1))
        said = said if isinstance(said, (int, float)) else 1
        name = str(file.scheduler.get("_class_name", "no scheduler"))
        if name.startswith("FlowMatch"):
            return f"a flow with shift {said:g} ({name}), with which its own SDXL pipeline cannot draw"
        if file.scheduler.get("use_flow_sigmas"):
            return f"a flow with shift {said:g} ({name}, use_flow_sigmas)"
    if not file.scheduler:
        return "noise prediction (no scheduler/scheduler_config.json)"
    said = str(file.scheduler.get("prediction_type", "epsilon"))
    names = {"v_prediction": "v-prediction", "epsilon": "noise prediction"}
    kind = f"{names.get(said, said)} (prediction_type)"
    if file.scheduler.get("rescale_betas_zero_snr"):
        kind += ", zero terminal SNR (rescale_betas_zero_snr)"
    return kind
