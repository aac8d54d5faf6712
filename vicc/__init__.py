"""Cross-stream prototypical contrasting for video, in notebooks you can read, run and import.

The names below are loaded from their modules when they are first used.
"""
from importlib import import_module

__version__ = '0.1.0'

_HOMES = {
    'manifests': 'read_manifest folder_manifest ucf101_manifest hmdb51_manifest kinetics_manifest',
    'video': 'read_frames test_clip_indices',
    'flow': 'tvl1 quantise dequantise',
    'backbones': 'create_backbone register_backbone',
    'prototypes': 'sinkhorn',
    'losses': 'swapped_prediction_loss',
    'streams': 'Stream load_stream load_released export_released',
    'trainer': 'Trainer',
    'alternation': 'alternate',
    'recipe': 'Recipe',
    'evaluation': 'extract_features retrieval_recall video_features nearest_neighbours',
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = ['__version__', *_MODULE_OF]


def __getattr__(name):
    "Load a name from its module. `prepare` is not among them: vicc.prepare is the module."
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vicc' has no attribute '{name}'")
    return getattr(import_module(f'{__name__}.{_MODULE_OF[name]}'), name)


def __dir__():
    return sorted([*globals(), *_MODULE_OF])
