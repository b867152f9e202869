# The C++ library for others: headers, the static library, find_package(VeloxQuant).
# Component `core`, so that the Python wheel (component `python`) does not carry it.

include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/VeloxQuant)

install(DIRECTORY include/veloxquant DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT core
  FILES_MATCHING PATTERN "*.h")
install(TARGETS veloxquant EXPORT VeloxQuantTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT core)
install(EXPORT VeloxQuantTargets NAMESPACE VeloxQuant:: DESTINATION ${package_dir} COMPONENT core)

configure_package_config_file(cmake/VeloxQuantConfig.cmake.in
  ${PROJECT_BINARY_DIR}/VeloxQuantConfig.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change the API.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/VeloxQuantConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/VeloxQuantConfig.cmake
  ${PROJECT_BINARY_DIR}/VeloxQuantConfigVersion.cmake DESTINATION ${package_dir} COMPONENT core)
