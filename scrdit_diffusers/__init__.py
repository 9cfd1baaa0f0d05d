"""scRDiT for diffusers: virtual single cells from a diffusion transformer."""

from importlib.metadata import version

from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers import FeatureExtractionMixin

from .augmentation import augment
from .cells.batches import CellBatches, CellCollator
from .cells.dataset import CellDataset, read_cells, split_cells
from .cells.fitting import fit_dataset
from .commands import train
from .count_head import SCRDiTCountHead
from .initialization import count_bins, initialize_from_cells
from .objective import FoldChangePrior, diffusion_loss
from .pipeline_scrdit import SCRDiTPipeline, SCRDiTPipelineOutput
from .pipeline_scrdit_annotate import SCRDiTAnnotatePipeline
from .pipeline_scrdit_complete import SCRDiTCompletePipeline
from .pipeline_scrdit_denoise import SCRDiTDenoisePipeline
from .pipeline_scrdit_interpolate import SCRDiTInterpolatePipeline
from .pipeline_scrdit_simulate import SCRDiTSimulatePipeline, draw_effects
from .pipeline_scrdit_translate import SCRDiTTranslatePipeline
from .processing_scrdit import SCRDiTProcessor
from .remote_code import push_remote_code
from .schedulers import default_scheduler
from .transformer_scrdit import SCRDIT_PRESETS, SCRDiTTransformer, fit_preset

__version__ = version("scrdit_diffusers")
__all__ = [
    "SCRDIT_PRESETS",
    "CellBatches",
    "CellCollator",
    "CellDataset",
    "FoldChangePrior",
    "SCRDiTAnnotatePipeline",
    "SCRDiTCompletePipeline",
    "SCRDiTCountHead",
    "SCRDiTDenoisePipeline",
    "SCRDiTInterpolatePipeline",
    "SCRDiTPipeline",
    "SCRDiTPipelineOutput",
    "SCRDiTProcessor",
    "SCRDiTSimulatePipeline",
    "SCRDiTTransformer",
    "SCRDiTTranslatePipeline",
    "augment",
    "count_bins",
    "default_scheduler",
    "diffusion_loss",
    "draw_effects",
    "fit_dataset",
    "fit_preset",
    "initialize_from_cells",
    "push_remote_code",
    "read_cells",
    "split_cells",
    "train",
]

# Registration: `DiffusionPipeline.from_pretrained` loads a component listed in model_index.json as
# ["scrdit_diffusers", "SCRDiTTransformer"] if this package is known to it (huggingface/diffusers#6563), and looks the
# base classes below up as attributes of this module.
_BASE_CLASSES = (ModelMixin, SchedulerMixin, FeatureExtractionMixin)
LOADABLE_CLASSES.setdefault(
    "scrdit_diffusers", {base.__name__: ["save_pretrained", "from_pretrained"] for base in _BASE_CLASSES}
)
