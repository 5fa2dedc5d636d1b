"""ResNet-56 on CIFAR-10 against other ways to integers: `make bench-resnet56`."""

import sys

from against_rivals import Promise, hold

if __name__ == "__main__":
    sys.exit(hold("resnet56", Promise("recipes/cifar10_resnet56.yaml", 0.005, 2.5)))
