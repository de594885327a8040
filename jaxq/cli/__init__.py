"""The command line: `jaxq sites | quantize | eval | generate | inspect | bench | recipes`."""

from jaxq.cli.app import app as app
from jaxq.cli.app import main as main
