"""The command line of timm_ddnn; a package of its own, because importing `timm_ddnn` imports torch and timm."""
