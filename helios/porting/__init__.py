"""Reads Accelerate scripts, and says what Helios has for what they use.

The scripts are parsed, not run, and neither torch nor Accelerate is imported.
"""

from helios.porting.findings import TRAPS, USES, Finding
from helios.porting.reading import read_script

__all__ = ["TRAPS", "USES", "Finding", "read_script"]
