"""Parameter-efficient adaptation: functions from parameter trees to parameter trees."""
