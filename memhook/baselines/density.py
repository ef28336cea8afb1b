"""The public name of `memhook.scores.density`, which the paper compares with."""

from memhook.scores.density import Statistic, descriptor_density, pixel_density, tile_distances

__all__ = ["Statistic", "descriptor_density", "pixel_density", "tile_distances"]
