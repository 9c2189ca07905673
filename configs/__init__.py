"""The yaml files shipped with xray; `xray.config.config_path` finds them."""
