"""The command line: `jaxq sites | quantize | eval | generate | inspect | recipes`."""

from jaxq.cli.app import app as app
from jaxq.cli.app import main as main
