"""The arrays that metrics read and give. Knows their numbers' types; axes are in the signatures."""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[np.generic]
