"""Small widgets for notebooks: labelled controls, a figure that follows them, and a sentence that says what it shows.

Each is an ipywidgets box whose display also carries its figure as SVG and as text, for pages without a kernel. Only this
package imports ipywidgets, and nothing in the kit imports this package.
"""

from fakit.widgets.layer_map import LayerMapChooser, layer_map_chooser
from fakit.widgets.panel import Panel
from fakit.widgets.temperature import TemperatureExplorer, temperature_explorer
from fakit.widgets.weights import LossWeights, loss_weights

__all__ = [
    "LayerMapChooser",
    "LossWeights",
    "Panel",
    "TemperatureExplorer",
    "layer_map_chooser",
    "loss_weights",
    "temperature_explorer",
]
