# SPDX-License-Identifier: AGPL-3.0-or-later
"""Measures how fast exported models are, and whether they agree with their checkpoints."""
