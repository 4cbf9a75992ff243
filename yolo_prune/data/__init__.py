# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images for calibration and validation, and samples of the inputs and outputs of layers."""
