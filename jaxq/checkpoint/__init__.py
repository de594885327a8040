"""Quantized models on disk: Orbax arrays plus a manifest that says what each of them must be."""

from jaxq.checkpoint.directory import check_destination as check_destination
from jaxq.checkpoint.manifest import read_manifest as read_manifest
from jaxq.checkpoint.model import is_saved as is_saved
from jaxq.checkpoint.model import load_model as load_model
from jaxq.checkpoint.store import load as load
from jaxq.checkpoint.store import save as save
