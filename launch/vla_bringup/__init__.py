"""Launch files, robot and policy descriptions, the demo and its report."""
