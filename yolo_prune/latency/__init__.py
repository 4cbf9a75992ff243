# SPDX-License-Identifier: AGPL-3.0-or-later
"""How does time follow widths? Layers are timed, added up, and corrected by whole models."""
