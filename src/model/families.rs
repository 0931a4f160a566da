//! The only place that knows a family's name: config.json keys, named sizes and tensor names.
//! Written with the checkpoint reader; nothing here touches tensor bytes.
