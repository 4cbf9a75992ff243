# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long a model takes on a device, as a function of its widths: layers are timed, added up, and set right."""
