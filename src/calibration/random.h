// The generator of the project, which codecs use too.
#pragma once

#include "src/math/random.h"
