# SPDX-License-Identifier: AGPL-3.0-or-later
"""How fast is an exported model, and is it still the same?"""
