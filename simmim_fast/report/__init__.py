"""What a run looks like: pictures and plots. matplotlib is imported where it draws."""

from simmim_fast.report.pictures import Reconstruction, draw_reconstruction, reconstruct
from simmim_fast.report.plots import plot_loss
from simmim_fast.report.run import plot_run, reconstruct_images

__all__ = ["Reconstruction", "draw_reconstruction", "plot_loss", "plot_run", "reconstruct", "reconstruct_images"]
