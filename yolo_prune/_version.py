# SPDX-License-Identifier: AGPL-3.0-or-later
"""The version. The build and the package both read this file."""

__version__ = "0.2.0"
