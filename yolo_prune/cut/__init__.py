# SPDX-License-Identifier: AGPL-3.0-or-later
"""The plan of a cut, and the steps that carry it out: surgery, proof and record."""
