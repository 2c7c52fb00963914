"""Radiance fields fitted to photos with poses."""
