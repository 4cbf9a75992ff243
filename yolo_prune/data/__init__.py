# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which images, and what do layers see of them?"""
