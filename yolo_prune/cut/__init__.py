# SPDX-License-Identifier: AGPL-3.0-or-later
"""The plan, and what it does to a model: surgery, proof, record."""
