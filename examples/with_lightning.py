"""Lightning: one more line in the Trainer, and the rates go where its metrics go.

python examples/with_lightning.py, after pip install 'lrprobe[lightning]' scikit-learn
"""

import lightning.pytorch as pl
from digits import load, zeiler_net
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import lrprobe
from lrprobe.integrations.lightning import LRProbeCallback


class Digits(pl.LightningModule):
    """Zeiler's network."""

    def __init__(self) -> None:
        """The same weights every time."""
        super().__init__()
        self.net = zeiler_net()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """One batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Optimizer:
        """AdamW."""
        return AdamW(self.parameters(), lr=1e-3)


digits = load()
batches = DataLoader(TensorDataset(digits.images, digits.labels), batch_size=20)
probe = LRProbeCallback()
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=3,
    logger=TensorBoardLogger("runs", name="lightning"),
    callbacks=[probe],  # the one line
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Digits(), batches)

frame = probe.probe.frame(by="module")
print(frame[frame["step"] == frame["step"].max()][["module", "lr", "effective_lr_p50"]].to_string())
print(f"TensorBoard: {trainer.logger.log_dir}")
print(lrprobe.read(trainer.logger.log_dir)["step"].nunique(), "recorded steps in it")
