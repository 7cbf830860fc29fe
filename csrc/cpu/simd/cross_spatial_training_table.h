// The stage cross_spatial in training for one instruction set. Included inside its namespace.

#include "slab_products_body.h"
#include "winograd_body.h"
#include "packing_body.h"
#include "slab_frame_body.h"
#include "slab_tiles_body.h"
#include "slab_direct_body.h"
#include "coordinate_attention_body.h"
#include "slab_rows_body.h"
#include "slab_gradients_body.h"
#ifdef CIEMA_BF16_ROWS
#include "slab_bf16_rows_body.h"
#else
#include "slab_float_rows_body.h"
#endif
#include "cross_spatial_training_weights_body.h"
#include "cross_spatial_training_body.h"
#include "cross_spatial_training_forward_body.h"
#include "cross_spatial_backward_body.h"
#include "cross_spatial_backward_maps_body.h"

constexpr CrossSpatialTraining kTable = {training_size,    pack_training,    forward_scratch,
                                         backward_scratch, training_forward, training_backward};
