"""The default loggers of a run: TensorBoard and CSV in one versioned folder."""

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


def run_loggers(folder: str | Path) -> list[Logger]:
    """Return TensorBoard and CSV loggers that write into `folder`/version_N, N not used before.

    Args:
        folder: The run's folder, made when something is written.
    """
    tensorboard = TensorBoardLogger(save_dir=folder, name="")
    version = f"version_{tensorboard.version}"
    return [
        TensorBoardLogger(save_dir=folder, name="", version=version),
        CSVLogger(save_dir=folder, name="", version=version, flush_logs_every_n_steps=1),
    ]
