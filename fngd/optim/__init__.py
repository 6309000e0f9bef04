"""What every optimiser here needs: groups, first-order steps, checks, guards, states and several processes.

Private: what is here may change from one version to the next.
"""
